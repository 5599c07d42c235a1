-- What did the judge like best, and what least? The extremes of five prompts in the last round.
with ranked as (
    select
        r.prompt_id,
        p.id,
        c.text,
        r.reward,
        row_number() over (partition by r.prompt_id order by r.reward desc, r.candidate) as from_best,
        row_number() over (partition by r.prompt_id order by r.reward, r.candidate) as from_worst
    from rewards r
    join candidates c using (round, prompt_id, candidate)
    join prompts p using (prompt_id)
    where r.round = (select max(round) from rewards)
)
select
    best.id,
    best.text as best,
    best.reward as best_reward,
    worst.text as worst,
    worst.reward as worst_reward
from ranked best
join ranked worst on worst.prompt_id = best.prompt_id and worst.from_worst = 1
where best.from_best = 1
order by best.id, best.prompt_id
limit 5
----
+-----+-------------------------------+-------------+--------------------------------+--------------+
| id  | best                          | best_reward | worst                          | worst_reward |
+-----+-------------------------------+-------------+--------------------------------+--------------+
| q0  | square a right star blue      | 0.96634334  | circle three left a            | 0.018743536  |
| q1  | and and the below below green | 0.83198786  | and square blue star right red | 0.4767498    |
| q10 | two left below                | 0.5891483   | the green left below           | 0.04641878   |
| q11 | below                         | 0.9118623   | of of circle three two red     | 0.16433927   |
| q12 | of green                      | 0.6646287   | a of blue                      | 0.042778015  |
+-----+-------------------------------+-------------+--------------------------------+--------------+
