"""Every method, routed and removed, at equal measured budgets, on held-out questions and under harder conditions."""
