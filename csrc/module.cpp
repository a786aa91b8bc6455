// The Python module of the extension. Loading it runs the STABLE_TORCH_LIBRARY_IMPL blocks of the other files, which
// register the CPU bodies of the ops that kernels/_ops.py declares. Its own functions tell and limit the instruction set.
#include <Python.h>

#include "simd.h"

namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16"};  // in the order of Isa

const char* name_of(fibecfed::Isa isa) { return kNames[static_cast<int>(isa)]; }

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(name_of(fibecfed::isa())); }

PyObject* limit_instruction_set(PyObject*, PyObject* name) {
  for (int i = 0; i < 4; ++i) {
    if (!PyUnicode_Check(name) || PyUnicode_CompareWithASCIIString(name, kNames[i]) != 0) continue;
    fibecfed::isa_limit().store(static_cast<fibecfed::Isa>(i));
    return instruction_set(nullptr, nullptr);
  }
  PyErr_SetString(PyExc_ValueError, "name: unknown, wanted one of baseline, avx2, avx512, avx512bf16");
  return nullptr;
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "The instruction set that the bodies use now."},
    {"limit_instruction_set", limit_instruction_set, METH_O,
     "Use none richer than the one named, in all threads; returns the one used now. For tests."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
