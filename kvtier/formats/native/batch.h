/* The pages and payloads of one call, held while kernels run. Checks come before the first byte is written; the only memory taken is the list
   of held buffers. All of it needs the interpreter's lock. */
#ifndef KVTIER_BATCH_H
#define KVTIER_BATCH_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "plan.h"

typedef struct {
    Py_buffer payload;
    size_t row;
    char *digest; /* where the payload's digest goes, if one is wanted */
} Page;

typedef struct {
    Plan plan;
    Py_buffer plan_bytes;
    Page *pages;
    Py_ssize_t count, held;
    char *address;
} Batch;

/* Takes hold of a plan alone. */
int batch_begin(Batch *batch, PyObject *plan);

/* Takes hold of pages at `address`, too. `rows` may be NULL: then page i is row i. `flags` say what payloads have to be. -1 with an error set,
   and nothing held, if that is not possible. */
int batch_hold(Batch *batch, char *address, PyObject *rows, PyObject *payloads, int flags);

void batch_close(Batch *batch);

#endif
