/* Which pages leave a tier: the first that nobody holds, by the columns of the page table that says who does. `A2CR.evict`. */
#include "spells.h"
#include "table.h"

#include <stdlib.h>

/* Pages that leave, and those before them that may not: they queue no more until the choice is made. */
typedef struct {
    const Rows *leaving;
    Py_ssize_t *kept, left, passed;
} Choice;

/* What will be looked at of the page two before this one, which is its turn soon if a request leaves from its end: fetched meanwhile. */
static void fetch_ahead(const Spells *s, const Table *table, int64_t tier, int64_t page) {
    const Ranking *r = s->ranking;
    const Py_ssize_t next = ranking_cell(r, r->parent[page]), later = ranking_cell(r, r->parent[next]);
    if (later >= table->rows) return;
    const void *const cells[] = {
        &r->here[later], &r->parent[later], &r->children[later], &r->depth[later], &r->place[later], &r->last[later], &r->score[later],
        &s->scored[later], &s->name[later], &s->facts[later * FACTS], &s->facts[later * FACTS + FACTS - 1],
        &table->copies[later], &table->leases[later], &table->readers[tier * table->cells + later],
    };
    for (size_t i = 0; i < sizeof cells / sizeof *cells; i++) __builtin_prefetch(cells[i]);
}

/* Whether as many pages as are wanted left the queue, and no more than these had to be passed over. */
static bool choose(const Spells *s, const Table *table, int64_t tier, Choice *choice) {
    Ranking *r = s->ranking;
    const Py_ssize_t wanted = choice->leaving->count;
    while (choice->left < wanted && choice->passed <= wanted) {
        const int64_t page = ranking_first(r);
        if (page < 0 || page >= table->rows) return false;
        fetch_ahead(s, table, tier, page);
        if (is_held(table, page, tier)) {
            choice->kept[choice->passed++] = page;
            ranking_unqueue(r, page);
        } else {
            *row_at(choice->leaving, choice->left++) = page;
            ranking_leave_first(r, page);
        }
    }
    return choice->left == wanted;
}

PyObject *evict(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("evict(out, table, tier, room, now)", given, 5)) return NULL;
    Spells *s = (Spells *)self;
    const Table *table = table_of(arguments[1]);
    bool failed = !table;
    const int64_t tier = failed ? 0 : number_of(arguments[2], &failed);
    const int64_t room = failed ? 0 : number_of(arguments[3], &failed);
    const double time = failed ? 0.0 : later_of(s, real_of(arguments[4], &failed));
    Rows out;
    if (failed || !rows_open(&out, arguments[0], true)) return NULL;
    Py_ssize_t *cells = malloc(sizeof *cells * (size_t)(2 * out.count + 1));
    Choice choice = {.leaving = &out, .kept = cells};
    s->guard[ROOM] = room;
    const bool usual = cells && tier_within(table, tier) && choose(s, table, tier, &choice);
    while (!usual && choice.left > 0) ranking_come(s->ranking, *row_at(&out, --choice.left));
    while (choice.passed > 0) ranking_enqueue(s->ranking, choice.kept[--choice.passed]);
    if (usual) {
        become_ghosts(s, &out, cells);
        s->clock[LATEST] = time;
    }
    free(cells);
    rows_close(&out);
    return PyBool_FromLong(usual);
}
