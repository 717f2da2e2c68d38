/* Pages that a request wrote come into the page table and into the policy of their tier at once: `A2CR.settle`. Where one of them
   finds a page unusual, nothing is changed in either. */
#include "spells.h"
#include "table.h"

/* The pages that are foreseen to come, on their way into the policy. False if one has a key that gives it no name. */
static bool announce(const Settling *settling, Coming *coming) {
    coming->links = (Links){settling->rows, settling->parents, settling->depths};
    bool usual = true;
    for (Py_ssize_t i = 0; usual && i < coming->names.count; i++) usual = name_of(PyTuple_GetItem(settling->chain.keys, i), row_at(&coming->names, i));
    return usual;
}

/* What `Spells.insert` would answer, with the pages in the table, too; an exception is set if something failed. */
static long settle_both(Spells *s, Table *table, Settling *settling, Coming *coming, PyObject *slots, double time) {
    if (foresee(table, settling, slots) < 1 || !announce(settling, coming) || enter_keys(settling) < 1) return UNUSUAL;
    long due = look_up(s, coming);
    if (due) {
        withdraw_keys(settling);
    } else {
        settle_entered(table, settling);
        due = let_in(s, coming, time);
    }
    look_away(coming);
    return due;
}

PyObject *settle(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    const char *method = "settle(table, row_of, keys, before, depth, parent, fill, tier, slots, out, now)";
    if (expect_arguments(method, given, 11)) return NULL;
    Spells *s = (Spells *)self;
    Table *table = table_of(arguments[0]);
    bool failed = !table;
    const double time = failed ? 0.0 : later_of(s, real_of(arguments[10], &failed));
    Settling settling;
    PyObject *slots = failed ? NULL : settling_open(&settling, arguments + 1);
    if (!slots) return NULL;
    long due = UNUSUAL;
    if (rows_open(&settling.rows, arguments[9], true)) {
        Coming coming = {0};
        Rows *const made[] = {&settling.parents, &settling.depths, &settling.slots, &coming.names};
        int count = 0;
        while (count < 4 && rows_make(made[count], settling.rows.count)) count++;
        if (count == 4) due = settle_both(s, table, &settling, &coming, slots, time);
        while (count > 0) rows_free(made[--count]);
        rows_close(&settling.rows);
    }
    settling_close(&settling, slots);
    return PyErr_Occurred() ? NULL : PyLong_FromLong(due);
}
