/* The arrays of one call of the loops that learn: see grids.h. */
#include "grids.h"

#include <string.h>

static void grids_close(Grids *grids) {
    while (grids->opened > 0) PyBuffer_Release(&grids->buffers[--grids->opened]);
}

static bool grid_open(Grids *grids, Grid *grid, PyObject *array, char type) {
    Py_buffer *buffer = &grids->buffers[grids->opened];
    if (PyObject_GetBuffer(array, buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | PyBUF_WRITABLE)) return false;
    grids->opened++;
    const char *format = buffer->format ? buffer->format : "B";
    const bool real = !strcmp(format, "d"), whole = !strcmp(format, "l") || !strcmp(format, "q");
    if ((type == 'd' ? !real : !whole) || buffer->ndim < 1 || buffer->ndim > 2 || (uintptr_t)buffer->buf % 8) {
        PyErr_Format(PyExc_ValueError, "an array of format %s with %d dimensions does not fit; expected %s", format, buffer->ndim,
                     type == 'd' ? "float64" : "int64");
        return false;
    }
    grid->d = buffer->buf, grid->q = buffer->buf;
    grid->columns = buffer->shape[buffer->ndim - 1];
    grid->rows = buffer->ndim == 2 ? buffer->shape[0] : 1;
    return true;
}

bool grids_open(Grids *grids, Grid *grid, PyObject *const *arrays, const char *types) {
    grids->opened = 0;
    for (int i = 0; types[i]; i++) {
        if (grid_open(grids, &grid[i], arrays[i], types[i])) continue;
        grids_close(grids);
        return false;
    }
    return true;
}

bool are_below(const Grid *grid, Py_ssize_t limit) {
    bool below = true;
    for (Py_ssize_t i = 0; i < grid->rows * grid->columns; i++) below &= (uint64_t)grid->q[i] < (uint64_t)limit;
    return below;
}

PyObject *grids_done(Grids *grids, bool good) {
    grids_close(grids);
    if (good) Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "arrays of a fit do not fit each other");
    return NULL;
}
