/* Which pages are there: rows by key, and what the columns say about rows. See table.h. */
#include "table.h"

#include <string.h>

Py_ssize_t walk(const Table *table, const Index *index, PyObject *keys, const Rows *out, bool visible) {
    const Py_ssize_t count = item_count(keys);
    if (out->count < count) {
        PyErr_SetString(PyExc_ValueError, "less room for rows than there are keys");
        return -1;
    }
    Batch batch;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i % BATCH == 0 && !index_batch(index, keys, i, &batch)) return -1;
        const int64_t row = index_find(index, batch.keys[i % BATCH], batch.tags[i % BATCH]);
        if ((uint64_t)row >= (uint64_t)table->rows || (visible && !(table->copies[row] & READY_ANYWHERE))) return i;
        *row_at(out, i) = row;
    }
    return count;
}

/* The visible prefix of keys, their rows into `out`; `claimed`, each has one more holder and use. */
static PyObject *prefix(Table *table, PyObject *const *arguments, bool claimed) {
    const Index *index = index_of(arguments[0]);
    PyObject *keys = index ? sequence_open(arguments[1]) : NULL;
    if (!keys) return NULL;
    Rows out;
    Py_ssize_t found = -1;
    if (rows_open(&out, arguments[2], true)) {
        found = walk(table, index, keys, &out, true);
        for (Py_ssize_t i = 0; claimed && i < found; i++) {
            table->leases[*row_at(&out, i)]++;
            table->uses[*row_at(&out, i)]++;
        }
        rows_close(&out);
    }
    Py_DECREF(keys);
    return found < 0 ? NULL : PyLong_FromSsize_t(found);
}

PyObject *table_find(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    return expect_arguments("find(row_of, keys, out)", given, 3) ? NULL : prefix((Table *)self, arguments, false);
}

PyObject *table_claim(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    return expect_arguments("claim(row_of, keys, out)", given, 3) ? NULL : prefix((Table *)self, arguments, true);
}

PyObject *table_links(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("links(rows, parents, depths)", given, 3)) return NULL;
    const Table *table = (Table *)self;
    Rows rows[3];
    int opened = 0;
    while (opened < 3 && rows_open(&rows[opened], arguments[opened], opened > 0)) opened++;
    const Py_ssize_t count = opened ? rows[0].count : 0;
    const bool usual = opened == 3 && rows[1].count == count && rows[2].count == count && rows_within(&rows[0], table->rows);
    bool attended = false;
    for (Py_ssize_t i = 0; usual && i < count; i++) {
        const int64_t row = *row_at(&rows[0], i);
        *row_at(&rows[1], i) = table->parent[row];
        *row_at(&rows[2], i) = table->depth[row];
        attended |= !isnan(table->attention[row]);
    }
    for (int i = 0; i < opened; i++) rows_close(&rows[i]);
    return opened < 3 ? NULL : PyLong_FromLong(usual ? attended : -1);
}

bool name_of(PyObject *key, int64_t *name) {
    char *bytes;
    Py_ssize_t size;
    if (!key || !(PyBytes_CheckExact(key) || PyBytes_Check(key)) || PyBytes_AsStringAndSize(key, &bytes, &size)) return false;
    if (size < (Py_ssize_t)sizeof *name) return false;
    memcpy(name, bytes, sizeof *name);
    return true;
}

/* The arguments (rows, out); `*usual` says whether all rows are the table's and `out` has as many. False with an exception if one is no
   array of rows; else `pair_close` them, whose answer is that. */
static bool pair_open(Rows pair[2], const Table *table, PyObject *const *arguments, bool *usual) {
    if (!rows_open(&pair[0], arguments[0], false)) return false;
    if (!rows_open(&pair[1], arguments[1], true)) {
        rows_close(&pair[0]);
        return false;
    }
    *usual = rows_within(&pair[0], table->rows) && pair[1].count == pair[0].count;
    return true;
}

static PyObject *pair_close(Rows pair[2], bool usual) {
    rows_close(&pair[1]);
    rows_close(&pair[0]);
    return PyBool_FromLong(usual);
}

PyObject *table_names(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("names(rows, out)", given, 2)) return NULL;
    const Table *table = (Table *)self;
    Rows pair[2];
    bool usual;
    if (!pair_open(pair, table, arguments, &usual)) return NULL;
    for (Py_ssize_t i = 0; usual && i < pair[0].count; i++) usual = name_of(table->key[*row_at(&pair[0], i)], row_at(&pair[1], i));
    return pair_close(pair, usual);
}

PyObject *table_warmest(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("warmest(rows, out)", given, 2)) return NULL;
    const Table *table = (Table *)self;
    Rows pair[2];
    bool usual;
    if (!pair_open(pair, table, arguments, &usual)) return NULL;
    for (Py_ssize_t i = 0; usual && i < pair[0].count; i++) {
        int64_t tier = 0;
        while (tier < table->tiers && *state(table, *row_at(&pair[0], i), tier) != READY) tier++;
        *row_at(&pair[1], i) = tier < table->tiers ? tier : NO_TIER;
    }
    return pair_close(pair, usual);
}
