"""The command `dash-shampoo`: train, demo. Its modules use only the public names of the package."""
