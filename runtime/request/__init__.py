"""What is asked, where it stands, and what comes back."""
