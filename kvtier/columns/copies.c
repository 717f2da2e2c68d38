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

/* The slots of these copies, those of the last row first if `backwards`: a list; NULL with an exception. */
static PyObject *slots_of(const Table *table, const Rows *rows, int64_t tier, bool backwards) {
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

/* These copies, which nobody reads, are no more, and neither are rows of which nothing is left. */
static void forget_copies(Burial *burial, const Rows *rows, int64_t tier) {
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

/* -- what leaves to make room -- */

bool exit_open(Exit *exit, PyObject *const *arguments, bool *usual) {
    bool failed = false;
    *exit = (Exit){.burial = {.table = table_of(arguments[0])}, .told = arguments[4]};
    const Table *table = exit->burial.table;
    if (!table || !(exit->burial.index = index_of(arguments[1]))) return false;
    exit->tier = number_of(arguments[2], &failed);
    exit->now = failed ? 0.0 : real_of(arguments[3], &failed);
    exit->hinted = !failed && number_of(arguments[5], &failed) != 0;
    if (!failed && exit->told != Py_None && !PyList_Check(exit->told)) {
        PyErr_SetString(PyExc_TypeError, "keys are told in a list, or None is given");
        failed = true;
    }
    *usual = tier_within(table, exit->tier) && has_sound_counts(table);
    exit->keeps_parents = exit->tier == table->tiers - 1 && (exit->tier > 0 || table->counts[HOLLOW]);
    return !failed;
}

static bool is_pinned(const Exit *exit, int64_t page) { return exit->burial.table->pin_until[page] > exit->now; }

/* Whether one of these copies is READY. */
static bool is_ready_within(const Table *table, int64_t page, int64_t first, int64_t last) {
    bool ready = false;
    for (int64_t tier = first; tier <= last && tier < table->tiers && !ready; tier++) ready = *state(table, page, tier) == READY;
    return ready;
}

/* Whether the copy in the tier is the only one, and READY. */
static bool is_alone(const Exit *exit, int64_t page) {
    uint64_t only = 0;
    ((uint8_t *)&only)[exit->tier] = READY;
    return exit->burial.table->copies[page] == only;
}

/* Whether a page is the last copy of one that others build on, which do not leave with it. */
static bool is_built_on(const Exit *exit, int64_t page) {
    const Table *table = exit->burial.table;
    bool warmer = false;
    for (int64_t tier = 0; tier < exit->tier && !warmer; tier++) warmer = *state(table, page, tier) != ABSENT;
    return !warmer && table->children[page] > table->leaving[page];
}

Fate fate_of(const Exit *exit, int64_t page) {
    const Table *table = exit->burial.table;
    int64_t coldest = table->tiers - 1;
    if (is_held(table, page, exit->tier) || (exit->hinted && table->prefetched_from[page] != NO_TIER)) return STAYS;
    if (is_pinned(exit, page)) {
        const int64_t floor = table->pin_tier[page];
        if (exit->tier >= floor && !is_ready_within(table, page, 0, floor < exit->tier ? floor : exit->tier - 1)) return STAYS;
        if (floor > exit->tier) coldest = floor;
    }
    if (exit->keeps_parents && is_built_on(exit, page)) return STAYS;
    if (*state(table, page, exit->tier) != READY) return MOVES;
    return exit->tier == table->tiers - 1 || is_ready_within(table, page, exit->tier + 1, coldest) ? LEAVES : MOVES;
}

static void count_leaving(const Exit *exit, int64_t page, int change) {
    const Table *table = exit->burial.table;
    if (exit->keeps_parents && is_alone(exit, page)) table->leaving[cell(table, table->parent[page])] += change;
}

void note_leaving(const Exit *exit, int64_t page) { count_leaving(exit, page, 1); }

void undo_note(const Exit *exit, int64_t page) { count_leaving(exit, page, -1); }

PyObject *slots_left(const Exit *exit, const Rows *rows) {
    const Table *table = exit->burial.table;
    PyObject *slots = slots_of(table, rows, exit->tier, true);
    for (Py_ssize_t i = 0; slots && exit->told != Py_None && i < rows->count; i++) {
        PyObject *key = table->key[*row_at(rows, i)];
        if (PyList_Append(exit->told, key ? key : Py_None)) Py_CLEAR(slots);
    }
    return slots;
}

void leave_for_good(Exit *exit, const Rows *rows) {
    /* Rows that go are counted off their parents themselves. */
    for (Py_ssize_t i = 0; i < rows->count; i++) undo_note(exit, *row_at(rows, i));
    forget_copies(&exit->burial, rows, exit->tier);
}
