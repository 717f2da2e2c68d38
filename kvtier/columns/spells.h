/* Columns of one A²CR policy as its loops see them: of pages (`kvtier.policy.spells`), of kinds (`kvtier.policy.reuse`), of ghosts
   (`kvtier.policy.memory`), of what LRU would do (`kvtier.policy.guard`). spells.c opens them, serving.c is what happens to pages, settling.c
   to those that come into the page table, too, ghosts.c what is remembered of those that left, scoring.c what pages are worth, leaving.c which
   of them leave, guarding.c the counts beside. */
#pragma once

#include "ranking.h"

enum { KIND, COHORT, USES, GENERATION, CALL, COMBINED, NAME, SCORED, FACTS }; /* of a page: `kvtier.policy.facts`, RECORD */
enum { FIRST, HELD, OWED, SETTLED, ROOM, FOLLOWS, DEBT, GAIN, LEFT, DOUBLINGS, FALLS, GUARD_CELLS };
enum { NOW, BEGUN, CALLS, SPELLS_DUE, CALLS_DUE, STARTED, PERIOD_CELLS }; /* NOW: the cohort that begins spells */
enum { CALL_NUMBER, SCORING, GONE, COUNT_CELLS }; /* SCORING: how often all pages were scored; GONE: those that left since */
enum { LATEST, SCORED_AT, CLOCK_CELLS };
enum { END_STEP, NEW_STEP, ATTENTION, NEW_VALUES, BASE_USES, MOST_DOUBLINGS, RESCORED_SHARE, STEPS };
enum { AGES = 56, RECENT_REQUESTS = 64 };

/* Answers of calls: nothing was done, as something is unusual, or as kinds are unknown that `missing` names; or, beside 0, what is due. */
enum { UNUSUAL = -1, UNKNOWN_KINDS = -2, COHORT_DUE = 1, ORDER_CHANGED = 2 };

/* One of the two cells of a name, which are one cache line: `kvtier.policy.memory`, the words as in `kvtier.policy.facts`. */
typedef struct {
    int64_t name;
    double last; /* -INFINITY: nothing is remembered here */
    int64_t call_and_kind, cohort_and_rest;
} Ghost;

enum { GHOST_WORDS = sizeof(Ghost) / 8, LOW_BITS = 16, BYTE_BITS = 8, MOST_USES_OF_GHOST = 255 };

typedef struct {
    PyObject_HEAD
    Ranking *ranking;
    PyObject *recent; /* dict: number of a call that used pages and may go on with new ones, to these pages: bytes, int64 [n] */
    int64_t *facts;                                             /* by page, FACTS each: one cache line */
    int64_t *kind_of, *hits, *change, *alive, *counted;         /* by kind, by age, by cohort */
    Ghost *ghosts;
    int64_t *guard, *ring, *period, *counts;                    /* by the names above; `ring` by call */
    int64_t *missing;                                           /* how many kinds are unknown, and the features of each */
    const int64_t *count_of, *generation_of, *steps;
    double *clock, *worth;
    const double *edges;
    Py_ssize_t pages, numbers, kinds, cohorts, cells, uses_told_apart, generations, calls, most_missing;
    unsigned shift; /* of a name's hash, so that it is a cell */
    int held;
    Py_buffer columns[18];
} Spells;

/* Numbers that Python keeps, or gives, are at most so large or small: sums of a few of them are numbers, too. */
static const int64_t MOST_COUNTED = (int64_t)1 << 61;

/* This time, unless a later one was seen. */
static inline double later_of(const Spells *s, double time) { return time > s->clock[LATEST] ? time : s->clock[LATEST]; }

/* What is known of a page. */
static inline int64_t *facts_of(const Spells *s, int64_t page) { return s->facts + page * FACTS; }

/* -- scoring.c -- */

int age_bin(double age);

/* A page's score is of the latest scoring from now on: what it was worth then, unless it was used or changed since. For `Ranking`. */
void spells_refresh(void *spells, int64_t page);

/* Scores a page as it is at this time. */
void score_at(Spells *s, int64_t page, double time);

/* All pages are scored anew if it is time for that. */
void score_if_due(Spells *s, double time);

PyObject *score_all(PyObject *self, PyObject *ignored);

/* -- guarding.c -- */

/* Whether the numbers that Python keeps beside pages can be what they say. */
bool is_in_order(const Spells *s);

/* Takes the last use of a page by that call out of the count; whether LRU would hold the page. */
bool was_held(Spells *s, int64_t call);

/* So many pages were used by this call: LRU holds them, and others no more. */
void count_held(Spells *s, Py_ssize_t pages, int64_t call);

/* A call that began so many spells is over: what is due now (COHORT_DUE, ORDER_CHANGED). */
long end_call(Spells *s, int64_t spells);

/* -- serving.c -- */

/* Pages on their way in, and what is known of them before anything changes. */
typedef struct {
    Links links;
    Rows names;
    Ghost **ghosts;                           /* of each, NULL where nothing is remembered */
    int64_t continued, generation;            /* the call that used the page which they continue, if that may go on (else -1); theirs */
    Rows used;                                /* the pages that it used, in the memory of `note` */
    PyObject *note;
    int64_t new;                              /* how many were no ghosts, as a part of the number of a kind */
    Py_ssize_t deepest;                       /* which of them is */
} Coming;

/* Whether these pages, with their links and names, can come: 0, or why not. To be ended by `look_away` in any case. */
long look_up(const Spells *s, Coming *coming);

void look_away(Coming *coming);

/* Pages that can come do: what is due. An exception is set if something failed. */
long let_in(Spells *s, const Coming *coming, double time);

PyObject *touch(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
PyObject *insert(PyObject *self, PyObject *const *arguments, Py_ssize_t given);

/* -- ghosts.c -- */

/* The first of the two cells of a name; the other is beside it. */
static inline Py_ssize_t first_cell(const Spells *s, int64_t name) {
    return (Py_ssize_t)(((uint64_t)name * 0x9E3779B97F4A7C15u) >> s->shift);
}

/* What is remembered of a name, NULL if nothing is. */
static inline Ghost *find_ghost(const Spells *s, int64_t name) {
    const Py_ssize_t first = first_cell(s, name);
    for (int way = 0; way < 2; way++) {
        Ghost *ghost = &s->ghosts[first ^ way];
        if (ghost->name == name && ghost->last != -INFINITY) return ghost;
    }
    return NULL;
}

static inline int64_t kind_of_ghost(const Ghost *ghost) { return ghost->call_and_kind & ((1 << LOW_BITS) - 1); }
static inline int64_t call_of_ghost(const Ghost *ghost) { return ghost->call_and_kind >> LOW_BITS; }
static inline int64_t cohort_of_ghost(const Ghost *ghost) { return ghost->cohort_and_rest >> LOW_BITS; }
static inline int64_t uses_of_ghost(const Ghost *ghost) { return ghost->cohort_and_rest >> BYTE_BITS & ((1 << BYTE_BITS) - 1); }
static inline int64_t generation_of_ghost(const Ghost *ghost) { return ghost->cohort_and_rest & ((1 << BYTE_BITS) - 1); }

/* Pages that left, of which all have a row, are remembered; `cells` is room for as many numbers. */
void become_ghosts(Spells *s, const Rows *pages, Py_ssize_t *cells);

PyObject *remember(PyObject *self, PyObject *pages);

/* -- settling.c -- */

PyObject *settle(PyObject *self, PyObject *const *arguments, Py_ssize_t given);

/* -- leaving.c -- */

PyObject *give_way(PyObject *self, PyObject *const *arguments, Py_ssize_t given);
