"""Who turns the loop, and where what comes of it goes."""
