"""HTTP: what every request passes, and how answers go back."""
