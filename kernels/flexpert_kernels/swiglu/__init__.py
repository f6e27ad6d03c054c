"""SwiGLU on rows [gate | up], times the router's weight, and its gradients."""
