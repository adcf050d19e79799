"""Thread bodies of the kernels and the one way they are launched; the public functions above this folder check and allocate."""
