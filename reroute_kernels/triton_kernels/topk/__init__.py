"""What the selection kernel is made of: softmax, radix select, shared state, phases, chunks, and what it emits."""
