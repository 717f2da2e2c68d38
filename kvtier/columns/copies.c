/* Copies of pages in tiers: reserved, committed, dropped. See table.h. */
#include "table.h"

/* As begin; `settled` also makes the copies READY, leased and used once more. */
static PyObject *place(Table *table, PyObject *const *arguments, bool settled) {
    bool failed = false;
    const int64_t tier = number_of(arguments[1], &failed);
    PyObject *slots = failed ? NULL : sequence_open(arguments[2]);
    Rows rows;
    if (!slots || !rows_open(&rows, arguments[0], false)) {
        Py_XDECREF(slots);
        return NULL;
    }
    const Py_ssize_t count = item_count(slots);
    bool usual = count == rows.count && tier_within(table, tier) && rows_within(&rows, table->rows);
    for (Py_ssize_t i = 0; usual && i < count; i++) usual = *state(table, *row_at(&rows, i), tier) == ABSENT;
    /* Slots are written first: they mean nothing while a copy is absent, should one of them be no number. */
    for (Py_ssize_t i = 0; usual && !failed && i < count; i++) {
        table->slot[tier * table->cells + *row_at(&rows, i)] = number_of(item(slots, i), &failed);
    }
    for (Py_ssize_t i = 0; usual && !failed && i < count; i++) {
        const int64_t row = *row_at(&rows, i);
        *state(table, row, tier) = settled ? READY : WRITING;
        table->leases[row] += settled;
        table->uses[row] += settled;
    }
    rows_close(&rows);
    Py_DECREF(slots);
    return failed ? NULL : PyBool_FromLong(usual);
}

PyObject *table_begin(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    return expect_arguments("begin(rows, tier, slots)", given, 3) ? NULL : place((Table *)self, arguments, false);
}

PyObject *table_settle(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    return expect_arguments("settle(rows, tier, slots)", given, 3) ? NULL : place((Table *)self, arguments, true);
}

PyObject *table_commit(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("commit(rows, tier)", given, 2)) return NULL;
    Table *table = (Table *)self;
    bool failed = false;
    const int64_t tier = number_of(arguments[1], &failed);
    Rows rows;
    if (failed || !rows_open(&rows, arguments[0], false)) return NULL;
    bool usual = tier_within(table, tier) && rows_within(&rows, table->rows);
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) usual = *state(table, *row_at(&rows, i), tier) == WRITING;
    for (Py_ssize_t i = 0; usual && i < rows.count; i++) *state(table, *row_at(&rows, i), tier) = READY;
    rows_close(&rows);
    return PyBool_FromLong(usual);
}

bool exit_open(Exit *exit, PyObject *const *arguments, bool *usual) {
    bool failed = false;
    exit->burial = (Burial){.table = table_of(arguments[0])};
    if (!exit->burial.table || !(exit->burial.index = index_of(arguments[1]))) return false;
    exit->tier = number_of(arguments[2], &failed);
    exit->clean = number_of(arguments[3], &failed) != 0;
    *usual = tier_within(exit->burial.table, exit->tier) && has_sound_counts(exit->burial.table);
    return !failed;
}

bool may_leave(const Exit *exit, int64_t page) {
    const Table *table = exit->burial.table;
    bool colder = !exit->clean;
    for (int64_t tier = exit->tier + 1; tier < table->tiers && !colder; tier++) colder = *state(table, page, tier) == READY;
    return colder && *state(table, page, exit->tier) == READY;
}

PyObject *slots_of(const Table *table, const Rows *rows, int64_t tier, bool backwards) {
    const int64_t *slot = table->slot + tier * table->cells;
    PyObject *slots = PyList_New(rows->count);
    for (Py_ssize_t i = 0; slots && i < rows->count; i++) {
        PyObject *number = PyLong_FromLongLong(slot[*row_at(rows, i)]);
        if (number && !PyList_SetItem(slots, backwards ? rows->count - 1 - i : i, number)) continue;
        Py_DECREF(slots);
        return NULL;
    }
    return slots;
}

void forget_copies(Burial *burial, const Rows *rows, int64_t tier) {
    Table *table = burial->table;
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        const int64_t row = *row_at(rows, i);
        *state(table, row, tier) = ABSENT;
        if (!table->copies[row] && table->leases[row]) table->counts[HOLLOW] = 1;
    }
    reap(burial, rows);
}

static PyObject *drop_rows(Burial *burial, const Rows *rows, int64_t tier) {
    const Table *table = burial->table;
    for (Py_ssize_t i = 0; i < rows->count; i++) {
        const int64_t row = *row_at(rows, i);
        if (*state(table, row, tier) == ABSENT || table->readers[tier * table->cells + row]) Py_RETURN_NONE;
    }
    PyObject *slots = slots_of(table, rows, tier, false);
    if (slots) forget_copies(burial, rows, tier);
    if (!burial->failed) return slots;
    Py_DECREF(slots);
    return NULL;
}

PyObject *table_drop(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("drop(rows, tier, row_of)", given, 3)) return NULL;
    Table *table = (Table *)self;
    bool failed = false;
    const int64_t tier = number_of(arguments[1], &failed);
    Burial burial = {table, index_of(arguments[2]), false};
    Rows rows;
    if (failed || !burial.index || !rows_open(&rows, arguments[0], false)) return NULL;
    PyObject *answer = Py_None;
    if (tier_within(table, tier) && rows_within(&rows, table->rows) && has_sound_counts(table)) {
        answer = drop_rows(&burial, &rows, tier);
    } else {
        Py_INCREF(answer);
    }
    rows_close(&rows);
    return answer;
}
