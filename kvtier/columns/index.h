/* Rows by page key, for the page table's loops: what a dict is to the table without them. No Python object for every row, cells that can be
   fetched before they are looked into, and one look to find out that a key is new and where it goes. */
#pragma once

#include "rows.h"

typedef struct {
    PyObject *key; /* NULL: nothing is here */
    uint32_t tag, row;
} Entry;

typedef struct {
    PyObject_HEAD
    Entry *entries;
    Py_ssize_t count;
    unsigned bits; /* of the number of cells, a power of two, a third of which are empty at least */
} Index;

static const int64_t MOST_ROWS = (int64_t)1 << 32; /* row numbers are below this */

/* The index that this object is, NULL with an exception if it is none. */
Index *index_of(PyObject *object);

enum { BATCH = 16 };

/* Keys, borrowed, and where to look for them. */
typedef struct {
    PyObject *keys[BATCH];
    uint32_t tags[BATCH];
} Batch;

/* The keys from keys[from] on, up to BATCH of them: they and the places where they are looked for are fetched. False with an exception if
   one is no key. */
bool index_batch(const Index *index, PyObject *keys, Py_ssize_t from, Batch *batch);

/* Fetches the place where a key is looked for, by this tag from now on; false for what is no key, without an exception. */
bool index_fetch(const Index *index, PyObject *key, uint32_t *tag);

/* The row of a key, NO_ROW if there is none. */
int64_t index_find(const Index *index, PyObject *key, uint32_t tag);

/* Room for so many more keys; false with an exception if there is none. */
bool index_make_room(Index *index, Py_ssize_t more);

/* A row for a key, for which there is room; false, and nothing done, if it has one. */
bool index_add(Index *index, PyObject *key, uint32_t tag, int64_t row);

/* A key has no row any more; false with an exception if it had none. */
bool index_remove(Index *index, PyObject *key);
bool index_remove_tagged(Index *index, PyObject *key, uint32_t tag);
