/* Where the numbers of a torch tensor are, asked for in one call of DLPack's exchange in C (1.3, which torch has since 2.10) instead of one call
   of Python for each thing to know: a page of 64 KiB is coded in some microseconds, and each such call takes a tenth of one. */
#ifndef KVTIER_TENSORS_H
#define KVTIER_TENSORS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "plan.h"

/* 1 if `pages` are `count` pages of the plan, in a contiguous tensor in CPU memory that is read as it is there, which then begins at `address`;
   0 if they are anything else; -1 with an error set. `expected`: see `NativeCodecs.encode_all`. */
int tensor_address(char **address, PyObject *expected, PyObject *pages, const Plan *plan, Py_ssize_t count);

#endif
