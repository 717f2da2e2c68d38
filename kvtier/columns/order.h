/* Columns and journal of one LRU order as its loops see them (`kvtier.policy.recency`). order.c is the journal, departing.c which pages leave,
   settling.c pages that come into the page table, too.

   A journal entry is a key (depth above page id) and a time; it is alive while its page has this key and this last touch. */
#pragma once

#include "rows.h"

enum { PAGE_BITS = 40, NOT_HERE = -1, ORDER_COLUMNS = 7 };
static const int64_t PAGE_MASK = ((int64_t)1 << PAGE_BITS) - 1, DEEPEST = ((int64_t)1 << (63 - PAGE_BITS)) - 1;

typedef struct {
    PyObject_HEAD
    int64_t *key, *parent, *children, *keys;
    double *last, *times;
    uint8_t *unqueued;
    Py_ssize_t pages, room; /* pages is one less than there are cells: the last cell is ROOT's */
    int held;
    Py_buffer columns[ORDER_COLUMNS];
} Order;

/* A page's cell; ROOT's for anything out of range. */
static inline Py_ssize_t order_cell(const Order *order, int64_t page) {
    return (uint64_t)page < (uint64_t)order->pages ? page : order->pages;
}

/* A number of journal entries or a position among them; `*failed` set and an exception where it is none. */
int64_t order_place(const Order *order, PyObject *object, bool *failed);

/* Whether these pages can come, none of which is here. */
bool order_may_come(const Order *order, const Links *links);

/* Pages that can come are here, with these links; they have no entry yet. */
void order_come(Order *order, const Links *links);

/* Whether there is room from `tail` on for entries of these pages, all of which have a cell. */
bool order_may_queue(const Order *order, const Rows *pages, int64_t tail);

/* Entries from `tail` on for pages that are here and were used at `time`. */
void order_queue(Order *order, const Rows *pages, int64_t tail, double time);

/* Sorts the living entries of the moment that begins at `start` and moves them to its end, each once; what comes before them repeats the
   first. Into `head` and `stop` where they begin and end. May be done again. */
void order_sort(Order *order, int64_t start, int64_t tail, int64_t *head, int64_t *stop);

/* -- settling.c, departing.c -- */

PyObject *order_settle(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *order_give_way(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
