// The Python module of the extension. It holds nothing: loading it runs the STABLE_TORCH_LIBRARY_IMPL blocks of the other
// files, which register the CPU bodies of the ops that kernels/_ops.py declares.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
