"""What ships with the package to show routing at work: ``tinyvlm``, a small trained model with questions to ask it."""
