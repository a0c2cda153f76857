"""Pictures: predictions with their two kinds of uncertainty, and the kernel as an image."""
