/* Which rows of a page table somebody holds in a tier, for loops over other columns. */
#pragma once

#include "rows.h"

typedef struct {
    const int64_t *leases, *readers; /* of the tier */
    const uint8_t *device;           /* state of the first copy, 8 bytes apart; NULL if that is the copy asked about */
    Py_ssize_t rows;
} Holders;

/* False with an exception if `table` is no table's loops; `rows` is 0 if the table has no such tier. */
bool holders_open(Holders *holders, PyObject *table, int64_t tier);

/* A lease holds the device copy, or what it will be made from. What is no row is held: nobody may let it go. */
static inline bool is_held(const Holders *holders, int64_t row) {
    enum { READY_COPY = 2 };
    if ((uint64_t)row >= (uint64_t)holders->rows) return true;
    return (holders->leases[row] && !(holders->device && holders->device[row * 8] == READY_COPY)) || holders->readers[row];
}
