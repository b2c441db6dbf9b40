"""OpenPCDet's compiled operations in plain torch: nothing to compile, on the CPU and any GPU, same names and results.

Each module here bears the name of one of pcdet's extension modules and has its functions, which write into the
tensors that they are given, as those do. `raytrain.tasks.openpcdet.adapted` puts them in place.
"""
