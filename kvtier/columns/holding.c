/* Who holds pages: leases and uses, and what may not leave a tier. See table.h. */
#include "table.h"

PyObject *table_lease(PyObject *self, PyObject *array) {
    Table *table = (Table *)self;
    Rows rows;
    if (!rows_open(&rows, array, false)) return NULL;
    const bool usual = rows_within(&rows, table->rows);
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) table->leases[*row_at(&rows, i)]++;
    rows_close(&rows);
    return PyBool_FromLong(usual);
}

PyObject *table_use(PyObject *self, PyObject *array) {
    Table *table = (Table *)self;
    Rows rows;
    if (!rows_open(&rows, array, false)) return NULL;
    const bool usual = rows_within(&rows, table->rows);
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) table->uses[*row_at(&rows, i)]++;
    rows_close(&rows);
    return PyBool_FromLong(usual);
}

PyObject *table_release(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("release(rows, row_of)", given, 2)) return NULL;
    Table *table = (Table *)self;
    Burial burial = {table, index_of(arguments[1]), false};
    Rows rows;
    if (!burial.index || !rows_open(&rows, arguments[0], false)) return NULL;
    bool usual = rows_within(&rows, table->rows) && has_sound_counts(table), left = false;
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) {
        const int64_t row = *row_at(&rows, i);
        usual = table->leases[row] > 0 && !table->open[row];
    }
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) {
        const int64_t row = *row_at(&rows, i);
        table->leases[row]--;
        left |= is_empty(table, row);
    }
    if (usual && left) reap(&burial, &rows);
    rows_close(&rows);
    return burial.failed ? NULL : PyBool_FromLong(usual);
}

PyObject *table_protect(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("protect(rows, tier, out)", given, 3)) return NULL;
    const Table *table = (Table *)self;
    bool failed = false;
    const int64_t tier = number_of(arguments[1], &failed);
    Rows rows;
    Py_buffer out;
    if (failed || !rows_open(&rows, arguments[0], false)) return NULL;
    if (PyObject_GetBuffer(arguments[2], &out, PyBUF_WRITABLE)) {
        rows_close(&rows);
        return NULL;
    }
    const bool usual = tier_within(table, tier) && out.len == rows.count && rows_within(&rows, table->rows);
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) ((uint8_t *)out.buf)[i] = is_held(table, *row_at(&rows, i), tier);
    PyBuffer_Release(&out);
    rows_close(&rows);
    return PyBool_FromLong(usual);
}
