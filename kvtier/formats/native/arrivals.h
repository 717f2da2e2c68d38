/* Records as they come from a disk, proven and decoded by whoever reads them; see NativeCodecs.arrivals. */
#ifndef KVTIER_ARRIVALS_H
#define KVTIER_ARRIVALS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Once, before the first `make_arrivals`; -1 with an exception. */
int prepare_arrivals(void);

PyObject *make_arrivals(PyObject *module, PyObject *const *arguments, Py_ssize_t given);

#endif
