/* Threads that run only while nothing else wants the processor. */
#include <stdbool.h>

/* The calling thread is one from now on, if the process may take that back and if it can be watched. */
void run_when_idle(void);

/* Gives the calling thread normal priority while it starts another, which inherits it; returns whether it had to. */
bool run_normally(void);

/* Undoes it. */
void run_when_idle_again(void);
