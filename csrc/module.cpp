// The Python module hyperfast._C: importing it loads this library, which registers the kernels
// (torch/); isa() says which build of them runs here.
#include <Python.h>

#include <stdexcept>

#include "dispatch.h"

namespace {

PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(hyperfast::kernels().isa);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set whose kernels run in this process."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  return PyModule_Create(&definition);
}
