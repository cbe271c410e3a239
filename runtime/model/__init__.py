"""An unmodified model: loaded, probed, and pointed at the slots."""
