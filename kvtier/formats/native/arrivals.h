/* Records as they came from a disk, proven and decoded in one call; see NativeCodecs.decode_proven. */
#ifndef KVTIER_ARRIVALS_H
#define KVTIER_ARRIVALS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject *decode_proven(PyObject *self, PyObject *const *arguments, Py_ssize_t given);

#endif
