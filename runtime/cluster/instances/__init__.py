"""Engines in processes of Ray's: started, reached, watched and ended."""
