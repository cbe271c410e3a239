"""Memory beside the steps: what a step takes, and what every slot holds."""
