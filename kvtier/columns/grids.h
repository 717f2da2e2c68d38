/* Arrays of one call: C-contiguous, [rows, columns] of float64 ('d') or int64 ('q'). */
#pragma once

#include "rows.h"

/* Compiled for wider registers, too, which divide twice as much at once; the C library chooses when the module is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

/* A part of a function that is WIDE: compiled into it, as what is for wide registers must not call what is not. */
#define PART static inline __attribute__((always_inline)) void

enum { MOST_GRIDS = 10 };

typedef struct {
    double *d;
    int64_t *q;
    Py_ssize_t rows, columns;
} Grid;

typedef struct {
    Py_buffer buffers[MOST_GRIDS];
    int opened;
} Grids;

/* Opens as many arrays as `types` has letters; closed again, with an exception, if one is of another type. */
bool grids_open(Grids *grids, Grid *grid, PyObject *const *arrays, const char *types);

static inline bool is_of(const Grid *grid, Py_ssize_t rows, Py_ssize_t columns) { return grid->rows == rows && grid->columns == columns; }

/* Whether every number is an index below `limit`. */
bool are_below(const Grid *grid, Py_ssize_t limit);

/* The end of every call: None, or ValueError where the arrays did not fit each other. */
PyObject *grids_done(Grids *grids, bool good);
