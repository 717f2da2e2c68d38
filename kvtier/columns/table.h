/* The page table's loops: what `kvtier.pages` does with columns, one row after the other instead of one NumPy call after the other. table.c
   opens the columns, index.c is where keys lead, finding.c finds rows, chains.c makes them, reaping.c gives them up, copies.c and holding.c
   are what happens to pages.

   A method that finds anything unusual answers False or None and has changed nothing: the same method in Python then does the work, or
   says what is wrong. Row numbers that columns hold are checked like those from outside; NO_ROW and all that is out of range means the
   last cell, which belongs to no row. */
#pragma once

#include "index.h"

enum { ABSENT, WRITING, READY, MOST_TIERS = 8, NO_TIER = -1 };
enum { SIZE, UNUSED, HOLLOW, TABLE_COUNTS }; /* rows there have been, those on the free list; whether a row ever had to stay for its children */
enum { TABLE_COLUMNS = 19 };
static const uint64_t READY_ANYWHERE = 0x0202020202020202;

typedef struct {
    PyObject_HEAD
    int64_t *parent, *children, *depth, *leases, *uses, *pin_tier, *leaving, *prefetched_from, *slot, *readers, *free, *counts;
    double *pin_until, *attention;
    uint64_t *copies;
    uint8_t *used, *open;
    PyObject **key, **parent_key;
    Py_ssize_t cells, rows; /* rows is cells - 1: the last cell is nobody's */
    Py_ssize_t tiers;
    int held;
    Py_buffer columns[TABLE_COLUMNS];
} Table;

static inline Py_ssize_t cell(const Table *table, int64_t row) { return (uint64_t)row < (uint64_t)table->rows ? row : table->rows; }

static inline uint8_t *state(const Table *table, int64_t row, int64_t tier) { return (uint8_t *)&table->copies[row] + tier; }

static inline bool is_empty(const Table *table, int64_t row) { return !table->copies[row] && !table->leases[row]; }

/* Whether the numbers of rows, which Python writes too, can be what they say. */
static inline bool has_sound_counts(const Table *table) {
    return (uint64_t)table->counts[SIZE] <= (uint64_t)table->rows && (uint64_t)table->counts[UNUSED] <= (uint64_t)table->rows;
}

static inline bool tier_within(const Table *table, int64_t tier) { return tier >= 0 && tier < table->tiers; }

/* Whether a row may not leave a tier that the table has: a lease holds the device copy, or what it will be made from. */
static inline bool is_held(const Table *table, int64_t row, int64_t tier) {
    const bool leased = table->leases[row] && !(tier && *state(table, row, 0) == READY);
    return leased || table->readers[tier * table->cells + row];
}

static inline void set_object(PyObject **place, PyObject *object) {
    PyObject *before = *place;
    Py_INCREF(object);
    *place = object;
    Py_XDECREF(before);
}

/* The table that this object is, NULL with an exception if it is none. */
Table *table_of(PyObject *object);

/* -- finding.c -- */

/* Rows of keys[i] into out[i] up to the first without a row, or (`visible`) without a READY copy. How many; -1 with an exception. */
Py_ssize_t walk(const Table *table, const Index *index, PyObject *keys, const Rows *out, bool visible);

/* What the page of a key is called: the first 8 bytes of it. False if it has none. */
bool name_of(PyObject *key, int64_t *name);

PyObject *table_find(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *table_claim(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *table_links(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *table_names(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *table_warmest(PyObject *self, PyObject *const *arguments, Py_ssize_t given);

/* -- chains.c -- */

/* Pages that follow each other. */
typedef struct {
    Index *index;
    PyObject *keys, *before; /* `keys` is a tuple, which nobody changes meanwhile */
    int64_t depth, parent;
} Chain;

/* The arguments (row_of, keys, before, depth, parent); false with an exception if they are something else, else `chain_close`. */
bool chain_open(Chain *chain, PyObject *const *arguments);

void chain_close(Chain *chain);

/* A chain of pages none of which has a row yet, and their copies in a tier. */
typedef struct {
    Chain chain;
    int64_t tier;
    Rows rows, parents, depths, slots;
} Settling;

/* The arguments (row_of, keys, before, depth, parent, tier, slots), the last of which is the answer; else NULL with an exception. */
PyObject *settling_open(Settling *settling, PyObject *const *arguments);

void settling_close(Settling *settling, PyObject *slots);

/* Which rows they will have, in which slots, after which ones; their keys are fetched. 1 if so, 0 if anything is unusual, -1 with an
   exception. */
int foresee(const Table *table, Settling *settling, PyObject *slots);

/* The keys lead to these rows. 1 if so; 0, and nothing done, if one leads to a row already; -1 with an exception. */
int enter_keys(Settling *settling);

/* That they do not, after all. */
void withdraw_keys(Settling *settling);

/* Makes what was foreseen so, of pages whose keys were entered: `PageTable.settle_chain`. */
void settle_entered(Table *table, Settling *settling);

PyObject *table_add_chain(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *table_settle_chain(PyObject *self, PyObject *const *arguments, Py_ssize_t given);

/* -- reaping.c -- */

/* Where rows are given up. */
typedef struct {
    Table *table;
    Index *index;
    bool failed; /* an exception is set */
} Burial;

/* Removes those of these rows of which nothing is left: `PageTable._reap`, in the same order. */
void reap(Burial *burial, const Rows *rows);

/* -- copies.c -- */

/* A tier that pages leave at a time for which pins count. */
typedef struct {
    Burial burial;
    int64_t tier;
    double now;
    PyObject *told;     /* a list for the keys of what left, or None */
    bool hinted;        /* it is for pages that a hint is about: those of other hints stay */
    bool keeps_parents; /* the last copy of a page may be there while others build on it */
} Exit;

enum { EXIT_ARGUMENTS = 6 };

/* The arguments (table, row_of, tier, now, told, hinted); false with an exception if they are something else. `*usual`: the table has such a tier. */
bool exit_open(Exit *exit, PyObject *const *arguments, bool *usual);

/* What can be done with a page. One that STAYS is held or read, pinned, hinted, or the last copy of one that others build on. The copy of one that
   MOVES is to be brought down first, or is not READY. */
typedef enum { LEAVES, STAYS, MOVES } Fate;
Fate fate_of(const Exit *exit, int64_t page);

/* A page was chosen to leave: until that is undone, its parent counts one child less among those that stay. */
void note_leaving(const Exit *exit, int64_t page);
void undo_note(const Exit *exit, int64_t page);

/* The slots of the pages that were chosen, those of the last first: a list, with which their keys are told. NULL with an exception. */
PyObject *slots_left(const Exit *exit, const Rows *rows);

/* What was chosen is no more. */
void leave_for_good(Exit *exit, const Rows *rows);

PyObject *table_begin(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *table_settle(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *table_commit(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *table_drop(PyObject *self, PyObject *const *arguments, Py_ssize_t given);

/* -- holding.c -- */

PyObject *table_lease(PyObject *self, PyObject *array);
PyObject *table_use(PyObject *self, PyObject *array);
PyObject *table_release(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *table_protect(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
