"""The Triton kernels and their launchers, one operation a file. Importing a file of it imports triton."""
