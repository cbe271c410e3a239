"""Which instances, of what size and for what, serve most requests as promised on given machines."""
