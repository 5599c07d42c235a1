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
+-----+-----------------------------------+-------------+-------------------------------------+--------------+
| id  | best                              | best_reward | worst                               | worst_reward |
+-----+-----------------------------------+-------------+-------------------------------------+--------------+
| q0  | above green                       | 0.9367963   | of blue three left a right          | 0.07952678   |
| q1  | square red                        | 0.8352266   | of three                            | 0.018693559  |
| q10 | a the two square                  | 0.9208772   | circle right star circle three blue | 0.32815534   |
| q11 | and square and                    | 0.99712646  | green and the of                    | 0.5940093    |
| q12 | of right square three circle left | 0.9944705   | and two above square                | 0.38508207   |
+-----+-----------------------------------+-------------+-------------------------------------+--------------+
