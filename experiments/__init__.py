"""Training, demo and plans; run from a checkout, with the public names of dash_shampoo alone."""
