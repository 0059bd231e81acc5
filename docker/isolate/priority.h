/* Threads that run only while nothing else wants the processor. */
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

/* The calling thread is one from now on, if it can be watched. `lowers`: with the lowest priority, if the process may
   take that back. `pauses`: and it pauses while it runs, so that its processor looks for what waits for another. */
void run_when_idle(bool lowers, bool pauses);

/* What a clock shows. */
uint64_t nanoseconds_of(clockid_t clock);

/* Stops the calling thread's pauses before it waits for something; returns whether they are to be started again. */
bool stop_pauses(void);

/* The calling thread pauses from now on, if it does so at all, until it is not seen to run. */
void start_pauses(void);

/* Sleeps, without pauses and however many signals arrive. */
void wait_for(uint64_t nanoseconds);

/* Gives the calling thread normal priority while it starts another, which inherits it; returns whether it had to. */
bool run_normally(void);

/* Undoes it. */
void run_when_idle_again(void);
