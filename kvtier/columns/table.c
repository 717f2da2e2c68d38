/* Opens the columns of a page table for its loops; see table.h. */
#include "table.h"

static void table_dealloc(PyObject *self) {
    Table *table = (Table *)self;
    PyTypeObject *type = Py_TYPE(self);
    while (table->held > 0) PyBuffer_Release(&table->columns[--table->held]);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

Table *table_of(PyObject *object) {
    if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)table_dealloc) return (Table *)object;
    PyErr_Format(PyExc_TypeError, "%R where a table's loops were expected", (PyObject *)Py_TYPE(object));
    return NULL;
}

static void *hold_column(Table *table, PyObject *columns, Py_ssize_t size, Py_ssize_t cells) {
    Py_buffer *column = &table->columns[table->held];
    PyObject *array = PyTuple_GetItem(columns, table->held);
    if (!array) return NULL;
    const int failed = column_open(column, array, size, cells);
    if (column->obj) table->held++;
    return failed ? NULL : column->buf;
}

static bool hold_columns(Table *table, PyObject *columns) {
    if (!(table->parent = hold_column(table, columns, 8, -1))) return false;
    const Py_ssize_t cells = table->columns[0].len / 8;
    if (!(table->slot = hold_column(table, columns, 8, -1))) return false;
    if (cells) table->tiers = table->columns[1].len / 8 / cells;
    if (!cells || cells > MOST_ROWS || table->tiers < 1 || table->tiers > MOST_TIERS) {
        PyErr_SetString(PyExc_ValueError, "a table needs a cell that is nobody's, 1 to 8 tiers, and less than 2**32 rows");
        return false;
    }
    table->cells = cells;
    table->rows = cells - 1;
    return (table->readers = hold_column(table, columns, 8, table->tiers * cells)) && (table->children = hold_column(table, columns, 8, cells)) &&
           (table->depth = hold_column(table, columns, 8, cells)) && (table->leases = hold_column(table, columns, 8, cells)) &&
           (table->uses = hold_column(table, columns, 8, cells)) && (table->pin_tier = hold_column(table, columns, 8, cells)) &&
           (table->leaving = hold_column(table, columns, 8, cells)) && (table->prefetched_from = hold_column(table, columns, 8, cells)) &&
           (table->pin_until = hold_column(table, columns, 8, cells)) && (table->attention = hold_column(table, columns, 8, cells)) &&
           (table->copies = hold_column(table, columns, 8, cells)) && (table->used = hold_column(table, columns, 1, cells)) &&
           (table->open = hold_column(table, columns, 1, cells)) && (table->key = hold_column(table, columns, sizeof(PyObject *), cells)) &&
           (table->parent_key = hold_column(table, columns, sizeof(PyObject *), cells)) &&
           (table->free = hold_column(table, columns, 8, table->rows)) && (table->counts = hold_column(table, columns, 8, TABLE_COUNTS));
}

static PyObject *table_new(PyTypeObject *type, PyObject *columns, PyObject *named) {
    (void)named;
    Table *table = (Table *)PyType_GenericAlloc(type, 0);
    if (!table) return NULL;
    if (expect_arguments("Table", PyTuple_Size(columns), TABLE_COLUMNS) || !hold_columns(table, columns)) {
        Py_DECREF(table);
        return NULL;
    }
    return (PyObject *)table;
}

static PyMethodDef methods[] = {
    {"find", FAST(table_find), NULL},           {"claim", FAST(table_claim), NULL},
    {"links", FAST(table_links), NULL},         {"names", FAST(table_names), NULL},
    {"warmest", FAST(table_warmest), NULL},     {"begin", FAST(table_begin), NULL},
    {"add_chain", FAST(table_add_chain), NULL}, {"settle_chain", FAST(table_settle_chain), NULL},
    {"settle", FAST(table_settle), NULL},       {"commit", FAST(table_commit), NULL},
    {"drop", FAST(table_drop), NULL},           {"lease", table_lease, METH_O, NULL},
    {"use", table_use, METH_O, NULL},           {"release", FAST(table_release), NULL},
    {"protect", FAST(table_protect), NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, table_new},
    {Py_tp_dealloc, table_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec table_spec = {"kvtier.columns._loops.Table", sizeof(Table), 0, Py_TPFLAGS_DEFAULT, slots};
