# Marks the repository root as the package percard for static readers; never shipped (see pyproject.toml).
