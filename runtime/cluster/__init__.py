"""Several instances behind one front end: who takes a request, and who hands one over."""
