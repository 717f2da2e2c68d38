/* Which pages leave a tier and the page table at once: the first of A2CR's queue that may, by the columns of the table (`fate_of`).
   `A2CR.give_way`, `Ranking.first` and `take`; that of LRU is in departing.c. */
#include "spells.h"
#include "table.h"

#include <stdlib.h>

/* Pages into `leaving` that left the queue, as many as are wanted if there are: how many. Those that stay are set aside. Unless such
   pages may leave, too, one whose copy moves ends it. */
static Py_ssize_t choose(Ranking *r, const Exit *exit, const Rows *leaving, bool moving) {
    const Table *table = exit->burial.table;
    int64_t aside = ranking_aside(r), page;
    while ((page = ranking_next_aside(r, &aside)) >= 0) {
        if (page >= table->rows || fate_of(exit, page) != STAYS) ranking_enqueue(r, page);
    }
    Py_ssize_t left = 0;
    while (left < leaving->count && (page = ranking_first(r)) >= 0 && page < table->rows) {
        const Fate fate = fate_of(exit, page);
        if (fate == MOVES && !moving) break;
        if (fate == STAYS) {
            ranking_set_aside(r, page);
        } else {
            note_leaving(exit, page);
            *row_at(leaving, left++) = page;
            ranking_leave_first(r, page);
        }
    }
    return left;
}

PyObject *give_way(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("give_way(table, row_of, tier, now, told, hinted, out, latest)", given, EXIT_ARGUMENTS + 2)) return NULL;
    Spells *s = (Spells *)self;
    Exit exit;
    bool usual, failed = !exit_open(&exit, arguments, &usual);
    const double time = failed ? 0.0 : later_of(s, real_of(arguments[EXIT_ARGUMENTS + 1], &failed));
    Rows out;
    if (failed || !rows_open(&out, arguments[EXIT_ARGUMENTS], true)) return NULL;
    Py_ssize_t *cells = malloc(sizeof *cells * (size_t)(out.count + 1)), left = 0;
    PyObject *slots = NULL;
    const int64_t room = ranking_cell(s->ranking, s->ranking->numbers[PRESENT]);
    usual = cells && usual && is_in_order(s);
    if (usual) score_if_due(s, time);
    if (usual) left = choose(s->ranking, &exit, &out, false);
    if (usual && left == out.count) slots = slots_left(&exit, &out);
    while (!slots && left > 0) {
        const int64_t page = *row_at(&out, --left);
        undo_note(&exit, page);
        ranking_come(s->ranking, page);
    }
    if (slots) {
        become_ghosts(s, &out, cells);
        s->guard[ROOM] = room, s->clock[LATEST] = time, s->counts[GONE] += out.count;
        leave_for_good(&exit, &out);
    }
    free(cells);
    rows_close(&out);
    if (exit.burial.failed) Py_CLEAR(slots);
    return slots || PyErr_Occurred() ? slots : Py_NewRef(Py_None);
}

PyObject *ranking_choose(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("choose(table, row_of, tier, now, told, hinted, out)", given, EXIT_ARGUMENTS + 1)) return NULL;
    Exit exit;
    Rows out;
    bool usual;
    if (!exit_open(&exit, arguments, &usual) || !rows_open(&out, arguments[EXIT_ARGUMENTS], true)) return NULL;
    const Py_ssize_t left = usual ? choose((Ranking *)self, &exit, &out, true) : -1;
    for (Py_ssize_t i = 0; i < left; i++) undo_note(&exit, *row_at(&out, i)); /* the table keeps them */
    rows_close(&out);
    return PyLong_FromSsize_t(left);
}
