"""The weighted sum of a token's rows, and its gradients."""
