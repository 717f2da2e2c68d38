/* What is remembered of pages that left, `kvtier.policy.memory`: a name has two cells beside each other. */
#include "spells.h"

#include <stdlib.h>

enum { AHEAD = 16 }; /* cells are fetched so many pages before their turn */

static Py_ssize_t cell_of_page(const Spells *s, int64_t page) { return first_cell(s, facts_of(s, page)[NAME]); }

/* Of the two cells of a page's name the one to write: that of the other page which was used longer ago. */
static Py_ssize_t cell_to_write(const Spells *s, int64_t page) {
    const Py_ssize_t cell = cell_of_page(s, page), other = cell ^ 1;
    return s->ghosts[other].last < s->ghosts[cell].last ? other : cell;
}

/* Two facts as one word: a larger one, which is taken for the most that it can be there beyond that, and what is in the bits below. */
static int64_t word(int64_t large, int64_t small) {
    const int64_t most = INT64_MAX >> LOW_BITS;
    return (int64_t)((uint64_t)(large < most ? large : most) << LOW_BITS) | small;
}

static Ghost ghost_of(const Spells *s, int64_t page) {
    const int64_t *facts = facts_of(s, page), uses = facts[USES] < MOST_USES_OF_GHOST ? facts[USES] : MOST_USES_OF_GHOST;
    const int64_t rest = (int64_t)((uint64_t)uses << BYTE_BITS) | facts[GENERATION];
    return (Ghost){facts[NAME], s->ranking->seats[page].last, word(facts[CALL], facts[KIND]), word(facts[COHORT], rest)};
}

void become_ghosts(Spells *s, const Rows *pages, Py_ssize_t *cells) {
    const Py_ssize_t count = pages->count;
    for (Py_ssize_t i = 0; i < AHEAD && i < count; i++) __builtin_prefetch(&s->ghosts[cell_of_page(s, *row_at(pages, i))], 1);
    /* All are chosen by the times as they were before any of these pages left. */
    for (Py_ssize_t i = 0; i < count; i++) {
        if (i + AHEAD < count) __builtin_prefetch(&s->ghosts[cell_of_page(s, *row_at(pages, i + AHEAD))], 1);
        cells[i] = cell_to_write(s, *row_at(pages, i));
    }
    for (Py_ssize_t i = 0; i < count; i++) s->ghosts[cells[i]] = ghost_of(s, *row_at(pages, i));
}

PyObject *remember(PyObject *self, PyObject *array) {
    Spells *s = (Spells *)self;
    Rows pages;
    if (!rows_open(&pages, array, false)) return NULL;
    Py_ssize_t *cells = malloc(sizeof *cells * (size_t)(pages.count + 1));
    const bool usual = cells && rows_within(&pages, s->pages);
    if (usual) become_ghosts(s, &pages, cells);
    free(cells);
    rows_close(&pages);
    return PyBool_FromLong(usual);
}
