"""Training of the models that ship with Reroute. Part of the repository, not of the installed package."""
