"""Sessions: conversations whose keys and values outlive the process."""
