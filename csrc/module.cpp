// The Python module grassland.kernels._C: importing it loads this library, which registers the operators.
#include <Python.h>

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Compiled operators of grassland.", -1, nullptr};

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) { return PyModule_Create(&module); }
