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
| 0               | 83      | 0.4837 | -0.0556     |
| 10              | 105     | 0.5212 | -0.0556     |
| 20              | 142     | 0.4968 | -0.0556     |
| 30              | 70      | 0.4247 | -0.0556     |
+-----------------+---------+--------+-------------+
