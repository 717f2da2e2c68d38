/* Arguments as the loops want them: columns held for as long as their owner lives, arrays of row numbers held for one call.

   Nothing here trusts a number from Python: what is read as an index has been compared with the length of what it indexes. */
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#define NO_ROW (-1)
#define ROOT (-1) /* the parent of a page that has none */

/* A one-dimensional int64 array of any stride. */
typedef struct {
    char *first;
    Py_ssize_t stride, count;
    Py_buffer buffer;
} Rows;

/* False with an exception if `array` is something else; else `rows_close` it. */
bool rows_open(Rows *rows, PyObject *array, bool writable);

static inline void rows_close(Rows *rows) { PyBuffer_Release(&rows->buffer); }

/* Room for so many, which is nobody's array; false with an exception if there is none; else `rows_free` it. */
bool rows_make(Rows *rows, Py_ssize_t count);

void rows_free(Rows *rows);

static inline int64_t *row_at(const Rows *rows, Py_ssize_t index) {
    return (int64_t *)(rows->first + index * rows->stride);
}

/* Whether all rows are below `limit` and none is negative. */
bool rows_within(const Rows *rows, Py_ssize_t limit);

/* The arguments (pages, parents, depths) of pages that come into a tier. */
typedef struct {
    Rows pages, parents, depths;
} Links;

/* False with an exception if one of them is no array of rows; else `links_close` it. */
bool links_open(Links *links, PyObject *const *arguments);

void links_close(Links *links);

/* Whether they are as many, all pages and parents have a cell below `limit` (a parent may be ROOT), and depths are 0 to `deepest`. */
bool links_possible(const Links *links, Py_ssize_t limit, int64_t deepest);

/* A C-contiguous column of `cells` cells of `size` bytes, to be written; -1 with an exception if it is something else. `cells` below 0:
   any number. */
int column_open(Py_buffer *column, PyObject *array, Py_ssize_t size, Py_ssize_t cells);

/* -1 with an exception unless as many arguments are given as the method takes. */
int expect_arguments(const char *method, Py_ssize_t given, Py_ssize_t expected);

/* A whole number, `*failed` set and an exception where it is none; `*failed` stays as it was otherwise. */
int64_t number_of(PyObject *object, bool *failed);

/* A number, likewise. */
double real_of(PyObject *object, bool *failed);

/* A list or a tuple with the items of a sequence, held: itself if it is one; NULL with an exception for what has no items. */
PyObject *sequence_open(PyObject *object);

/* Number of items of such a sequence. */
Py_ssize_t item_count(PyObject *sequence);

/* Item `index` of such a sequence, borrowed; NULL with an exception if it has none. */
static inline PyObject *item(PyObject *sequence, Py_ssize_t index) {
    return PyTuple_CheckExact(sequence) ? PyTuple_GetItem(sequence, index) : PyList_GetItem(sequence, index);
}

#define FAST(function) ((PyCFunction)(void (*)(void))function), METH_FASTCALL

/* What module.c offers to Python; `kvtier/columns/__init__.py` says what each does. */
extern PyType_Spec index_spec, table_spec, order_spec, ranking_spec, spells_spec;
PyObject *take_slots(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *give_slots(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *expose(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *learn(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *appraise(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
