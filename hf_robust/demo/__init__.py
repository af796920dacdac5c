"""The demo: one image, one attack, the robust and the plain model side by side."""
