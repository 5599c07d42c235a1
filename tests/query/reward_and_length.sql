-- Does the judge simply like long answers? The mean reward by length, and how the two go together.
select
    length(c.text) / 10 * 10 as characters_from,
    count(*) as answers,
    round(avg(r.reward), 4) as mean,
    (select round(corr(length(text), reward), 4)
     from candidates join rewards using (round, prompt_id, candidate)) as correlation
from candidates c
join rewards r using (round, prompt_id, candidate)
group by characters_from
order by characters_from
----
+-----------------+---------+--------+-------------+
| characters_from | answers | mean   | correlation |
+-----------------+---------+--------+-------------+
| 0               | 87      | 0.4712 | -0.0088     |
| 10              | 93      | 0.5315 | -0.0088     |
| 20              | 140     | 0.489  | -0.0088     |
| 30              | 80      | 0.4932 | -0.0088     |
+-----------------+---------+--------+-------------+
