-- Is max_new_tokens large enough? The share of answers of each round that were cut off at it.
select
    round,
    count(*) as answers,
    count(*) filter (where finish = 'length') as cut_off,
    round(avg(case when finish = 'length' then 1.0 else 0.0 end), 3) as share
from candidates
group by round
order by round
----
+-------+---------+---------+-------+
| round | answers | cut_off | share |
+-------+---------+---------+-------+
| 1     | 200     | 81      | 0.405 |
| 2     | 200     | 75      | 0.375 |
+-------+---------+---------+-------+
